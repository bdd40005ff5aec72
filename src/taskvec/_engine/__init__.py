"""How a function of tensors becomes a function of models: sources, pieces, statistics, selection, and the driver."""
