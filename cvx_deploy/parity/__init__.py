"""Whether a bundle computes what diffusers computes, and whether it is sound."""
