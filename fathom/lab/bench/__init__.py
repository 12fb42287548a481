"""`fathom bench`: each case in a fresh process, beside a peer and the machine's measured ceilings (docs/performance.md)."""
