"""What is trained: each task turns a batch into losses."""
