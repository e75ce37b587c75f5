# Solutions of the exercises in lessons/0_tokens.ipynb. `python -m lessons.execute` runs them in place of the skeletons.
# ruff: noqa: F821

# %% exercise-1
def count_pairs_of(frequencies):
    pairs = Counter()
    for word, frequency in frequencies.items():
        for pair in pairwise(word):
            pairs[pair] += frequency
    return pairs


# %% exercise-2
def decode(ids):
    characters = "".join(token_of[number] for number in ids)
    return bytes(byte_of[character] for character in characters).decode()


# %% exercise-3
def draw(logits, temperature, number):
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, number, replacement=True)
