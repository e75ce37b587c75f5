"""Solutions of the exercises in `2_instructions.ipynb`."""
# ruff: noqa: F821


# %% exercise-1
def make_turn_labels(ids, assistant, end):
    labels = []
    is_answer = False
    for token in ids:
        labels.append(token if is_answer else IGNORED)
        if token == assistant:
            is_answer = True
        if token == end:
            is_answer = False
    return labels


# %% exercise-2
def pack(lengths, size):
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= size]
        if fitting:
            # The fullest of these rows has the least room.
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


# %% exercise-3
def batch_loss(parts):
    total = 0.0
    count = 0
    for logits, labels in parts:
        logps = logits[:, :-1].float().log_softmax(-1)
        targets = labels[:, 1:]
        is_label = targets != IGNORED
        # -100 is not an id, so any id stands for it until it is masked.
        of_targets = logps.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
        total -= of_targets[is_label].sum()
        count += is_label.sum()
    return total / count
