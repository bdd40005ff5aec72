"""Shapes of models, for programs that are timed; nothing but the standard library, so that any environment can ask."""


def vit(width: int = 768, layers: int = 12) -> dict[str, tuple[int, ...]]:
    """The tensors of a vision transformer with patches of 16 x 16 in 224 x 224 pixels; a ViT-B by default."""
    block = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.up": (4 * width, width),
        "mlp.down": (width, 4 * width),
    }
    found: dict[str, tuple[int, ...]] = {"patch.weight": (width, 3, 16, 16), "position": (197, width)}
    for i in range(layers):
        for name, shape in block.items():
            found |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        found |= {f"blocks.{i}.{norm}.weight": (width,) for norm in ("norm1", "norm2")}
    return found
