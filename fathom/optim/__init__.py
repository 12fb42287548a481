"""Parameter updates and the schedules that drive them."""
