"""What knows a host framework: one room a framework."""
