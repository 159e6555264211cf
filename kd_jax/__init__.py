"""Distil a large language model into a small one: any divergence, any assistant, any schedule, whose text you like."""
