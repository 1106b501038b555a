"""What every room uses: errors, progress, text for people, the base of typed settings."""
