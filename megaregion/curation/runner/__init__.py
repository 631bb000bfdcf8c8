"""Runs the stages: which pieces are to do, who does them, how far a run is and what it found."""
