"""Reinforcement learning from prompts with verifiable answers: which prompts to practise on."""
