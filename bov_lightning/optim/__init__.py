"""The Muon and AdamW optimizer, its parameter groups and its schedules. Knows no Lightning."""
