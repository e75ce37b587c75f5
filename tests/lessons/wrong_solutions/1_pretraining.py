# Mistakes that the cells after the exercises in lessons/1_pretraining.ipynb must notice.
# ruff: noqa: F811, F821

# %% exercise-1: does not shift
def mean_loss(logits, labels):
    is_label = labels != -100
    picked = logits.log_softmax(-1)[is_label].gather(1, labels[is_label][:, None])
    return -picked.mean()


# %% exercise-1: shifts in the other direction
def mean_loss(logits, labels):
    targets = labels[:, :-1]
    is_label = targets != -100
    picked = logits[:, 1:].log_softmax(-1)[is_label].gather(1, targets[is_label][:, None])
    return -picked.mean()


# %% exercise-1: divides by the number of places, with or without a label
def mean_loss(logits, labels):
    targets = labels[:, 1:]
    is_label = targets != -100
    picked = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * is_label).mean()


# %% exercise-2: also compares the places that may notice
def sees_the_future(predict, ids):
    original = predict(ids)
    changed = ids.clone()
    changed[0, -2] = (changed[0, -2] + 1) % original.shape[-1]
    return not torch.allclose(predict(changed), original, atol=1e-5)


# %% exercise-2: asks only the first place about the last token
def sees_the_future(predict, ids):
    original = predict(ids)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % original.shape[-1]
    return not torch.allclose(predict(changed)[:, 0], original[:, 0], atol=1e-5)


# %% exercise-2: compares the most probable tokens only
def sees_the_future(predict, ids):
    original = predict(ids).argmax(-1)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % predict(ids).shape[-1]
        if not torch.equal(predict(changed).argmax(-1)[:, :place], original[:, :place]):
            return True
    return False


# %% exercise-3: takes the natural logarithm
def bits_per_byte_of_frequencies(train_ids, held_out_ids, vocabulary_size, number_of_bytes):
    counts = np.bincount(train_ids, minlength=vocabulary_size)
    probabilities = (counts + 1) / (len(train_ids) + vocabulary_size)
    return -np.log(probabilities[held_out_ids]).sum() / number_of_bytes


# %% exercise-3: divides by tokens
def bits_per_byte_of_frequencies(train_ids, held_out_ids, vocabulary_size, number_of_bytes):
    counts = np.bincount(train_ids, minlength=vocabulary_size)
    probabilities = (counts + 1) / (len(train_ids) + vocabulary_size)
    return -np.log2(probabilities[held_out_ids]).mean()


# %% exercise-3: probabilities that do not sum to 1
def bits_per_byte_of_frequencies(train_ids, held_out_ids, vocabulary_size, number_of_bytes):
    counts = np.bincount(train_ids, minlength=vocabulary_size)
    probabilities = (counts + 1) / len(train_ids)
    return -np.log2(probabilities[held_out_ids]).sum() / number_of_bytes
