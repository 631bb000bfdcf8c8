"""Code that is copied beside exported weights and runs without megaregion."""
