"""A model that thinks when it is asked to: SFT with a toggle, reinforcement learning in stages from easy to hard, both modes measured."""
