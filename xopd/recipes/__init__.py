"""Recipes: complete, seeded ways to make something from nothing."""
