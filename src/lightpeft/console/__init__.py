"""What a terminal shows while something runs, and what it reads and writes."""
