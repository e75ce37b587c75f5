"""Real English from package registries: two dictionaries, conversations, prose and facts about countries."""
