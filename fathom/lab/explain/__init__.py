"""One token's journey through a real model, recorded from outside and told by a page."""
