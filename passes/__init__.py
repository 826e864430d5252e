"""Graph passes: find attention and cache updates, plan, rewrite. One pass a file."""
