"""The dataset format that trainers read: written, packed, counted, looked into, verified."""
