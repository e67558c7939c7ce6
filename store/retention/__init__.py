"""What of a VM's history is kept, and how much it may store."""
