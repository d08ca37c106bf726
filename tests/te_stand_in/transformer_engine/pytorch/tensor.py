"""Types by which Megatron-core knows FP8 parameters; the stand-in has none."""


class QuantizedTensor:
    """Never made."""
