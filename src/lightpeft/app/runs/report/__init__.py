"""`lightpeft report`: one page about runs, made of what lies in their folders: read, drawn, set."""
