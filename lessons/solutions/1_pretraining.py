# Solutions of the exercises in lessons/1_pretraining.ipynb. `python -m lessons.execute` runs them, not the skeletons.
# ruff: noqa: F821

# %% exercise-1
def mean_loss(logits, labels):
    log_probabilities = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    is_label = targets != -100
    picked = log_probabilities[is_label].gather(1, targets[is_label][:, None])
    return -picked.mean()


# %% exercise-2
def sees_the_future(predict, ids):
    original = predict(ids)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % original.shape[-1]
        if not torch.allclose(predict(changed)[:, :place], original[:, :place], atol=1e-5):
            return True
    return False


# %% exercise-3
def bits_per_byte_of_frequencies(train_ids, held_out_ids, vocabulary_size, number_of_bytes):
    counts = np.bincount(train_ids, minlength=vocabulary_size)
    probabilities = (counts + 1) / (len(train_ids) + vocabulary_size)
    return -np.log2(probabilities[held_out_ids]).sum() / number_of_bytes
