# Mistakes that the cells after the exercises in lessons/0_tokens.ipynb must notice.
# ruff: noqa: F811, F821

# %% exercise-1: does not count how frequent a word is
def count_pairs_of(frequencies):
    pairs = Counter()
    for word in frequencies:
        pairs.update(pairwise(word))
    return pairs


# %% exercise-1: counts a pair once in a word
def count_pairs_of(frequencies):
    pairs = Counter()
    for word, frequency in frequencies.items():
        for pair in set(pairwise(word)):
            pairs[pair] += frequency
    return pairs


# %% exercise-1: counts pairs that reach across words
def count_pairs_of(frequencies):
    tokens = []
    for word, frequency in frequencies.items():
        tokens += list(word) * frequency
    return Counter(pairwise(tokens))


# %% exercise-2: leaves the visible characters
def decode(ids):
    return "".join(token_of[number] for number in ids)


# %% exercise-2: decodes the bytes of each token separately
def decode(ids):
    pieces = [bytes(byte_of[character] for character in token_of[number]) for number in ids]
    return "".join(piece.decode(errors="replace") for piece in pieces)


# %% exercise-2: takes each byte for a character
def decode(ids):
    characters = "".join(token_of[number] for number in ids)
    return "".join(chr(byte_of[character]) for character in characters)


# %% exercise-3: multiplies by the temperature
def draw(logits, temperature, number):
    probabilities = (logits * temperature).softmax(-1)
    return torch.multinomial(probabilities, number, replacement=True)


# %% exercise-3: divides the probabilities instead of the logits
def draw(logits, temperature, number):
    probabilities = logits.softmax(-1) / temperature
    return torch.multinomial(probabilities, number, replacement=True)


# %% exercise-3: takes the most probable token
def draw(logits, temperature, number):
    probabilities = (logits / temperature).softmax(-1)
    return probabilities.argmax().repeat(number)
