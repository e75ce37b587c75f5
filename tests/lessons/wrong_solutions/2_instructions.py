"""Wrong solutions of the exercises in `2_instructions.ipynb`."""
# ruff: noqa: F811, F821


# %% exercise-1: only the last answer is labelled
def make_turn_labels(ids, assistant, end):
    begin = len(ids) - ids[::-1].index(assistant)
    return [IGNORED] * begin + ids[begin:]


# %% exercise-1: the end of an answer has no label
def make_turn_labels(ids, assistant, end):
    labels = []
    is_answer = False
    for token in ids:
        if token == end:
            is_answer = False
        labels.append(token if is_answer else IGNORED)
        if token == assistant:
            is_answer = True
    return labels


# %% exercise-1: everything after the first answer has begun is labelled
def make_turn_labels(ids, assistant, end):
    begin = ids.index(assistant) + 1
    return [IGNORED] * begin + ids[begin:]


# %% exercise-2: the lengths are not sorted
def pack(lengths, size):
    rows = []
    for length in lengths:
        fitting = [row for row in rows if sum(row) + length <= size]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


# %% exercise-2: the first row in which a length fits, not the tightest
def pack(lengths, size):
    rows = []
    for length in sorted(lengths, reverse=True):
        for row in rows:
            if sum(row) + length <= size:
                row.append(length)
                break
        else:
            rows.append([length])
    return rows


# %% exercise-2: rows are filled one after the other
def pack(lengths, size):
    rows = [[]]
    for length in sorted(lengths, reverse=True):
        if sum(rows[-1]) + length > size:
            rows.append([])
        rows[-1].append(length)
    return rows


# %% exercise-3: the mean of the means of the parts
def batch_loss(parts):
    losses = []
    for logits, labels in parts:
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    return sum(losses) / len(losses)


# %% exercise-3: the labels are not shifted
def batch_loss(parts):
    logits = torch.cat([part[0].flatten(0, 1) for part in parts])
    labels = torch.cat([part[1].flatten() for part in parts])
    return torch.nn.functional.cross_entropy(logits, labels)


# %% exercise-3: divided by all tokens, with and without a label
def batch_loss(parts):
    total = 0.0
    count = 0
    for logits, labels in parts:
        targets = labels[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        count += len(targets)
    return total / count
