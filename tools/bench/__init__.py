"""Step times of recurrence schemes beside a plain Megatron-core GPT, and what each keeps for backward."""
