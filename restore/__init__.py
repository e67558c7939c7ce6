"""Plans, restore workers, scrubbing, rollback."""
