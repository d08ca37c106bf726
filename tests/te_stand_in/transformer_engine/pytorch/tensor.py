"""Types by which Megatron-core recognises FP8 parameters, of which the stand-in has none."""


class QuantizedTensor:
    """Never instantiated."""
