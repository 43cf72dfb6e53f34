"""`lightpeft demo`: plain LoRA and lightpeft on a real model and real rows."""
