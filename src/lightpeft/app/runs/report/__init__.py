"""`lightpeft report`: one HTML page about runs, from the files in their folders."""
