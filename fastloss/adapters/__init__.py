"""Other libraries' losses, by their own names and signatures. Each module needs its library, and names the extra."""
