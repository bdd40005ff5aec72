"""What the examples share: small real image tasks, small encoders, and the training of them, cached on disk.

None of this is part of the library. It is what a study of model merging needs around the library: something to merge.
"""
