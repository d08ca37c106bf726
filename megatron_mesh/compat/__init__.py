"""Everything that depends on the internals of Megatron-core, torch and other packages."""
