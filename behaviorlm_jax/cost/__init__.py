"""What a step will need of a machine, before anyone has it."""
