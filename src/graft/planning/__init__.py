"""What a run takes, known before it starts: memory and time, on this machine or a named card."""
