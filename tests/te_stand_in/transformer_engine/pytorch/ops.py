"""Names in Megatron-core's annotations."""


class Sequential:
    """Never used."""


class FusibleOperation:
    """Never used."""
