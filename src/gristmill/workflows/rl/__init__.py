"""Reinforcement learning: rollouts of a model, rewards by programs, policy gradients."""
