"""Profiles beyond one prefill and one process: fitted from samples, kept on disk, carried."""
