"""The choices of each method of `modeling_ivtp.methods`, from its paper's equations, as plain NumPy loops.

Every function gets the step that the engine asks the method at. It returns the tokens of one image that stay,
ascending, and what they become: weights of all tokens before, or None if they stay as they are. Of equal scores the
earlier token counts as the higher one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Result = tuple[np.ndarray, np.ndarray | None]


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().double().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def top(scores: np.ndarray, keep: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:keep])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def eye(kept: np.ndarray, tokens: int) -> np.ndarray:
    return np.eye(tokens)[kept]


def cls_row(record: Any, image: int) -> np.ndarray:
    """Mean over heads of softmax(q_cls K^T / sqrt(d)), without the entry of CLS."""
    query, key = array(record.query)[image, :, 0, 0], array(record.key)[image]
    return np.mean([softmax(key[h] @ query[h] * record.scale) for h in range(len(key))], axis=0)[1:]


def topk(method: Any, step: Any, image: int) -> Result:
    if method.criterion == "similarity":
        cls, *patches = unit(array(step.hidden)[image])
        return top(np.array(patches) @ cls, step.group.keep), None
    return top(cls_row(step.records[-1], image), step.group.keep), None


def topk_plus(method: Any, step: Any, row: int, image: int) -> Result:
    """What the image's CLS attends to, which stands first among the tracked columns, or is most similar to."""
    columns = visual_columns(step.sequence, row, image)
    if method.criterion == "similarity":
        return top(
            unit(array(step.hidden)[row][columns]) @ unit(array(step.pseudo_cls)[row, image]), step.group.keep
        ), None
    record = step.records[-1]
    query, keys = array(record.query)[row, :, image, 0], array(record.key)[row]
    keys = np.repeat(keys, len(query) // len(keys), axis=0)
    visible = array(record.visible)[row, image, 0]
    logits = [np.where(visible, key @ one * record.scale, -np.inf) for key, one in zip(keys, query, strict=True)]
    attention = np.mean([softmax(head) for head in logits], axis=0)
    return top(attention[array(record.columns)[row, image][1:][: len(columns)]], step.group.keep), None


def evit(method: Any, step: Any, image: int) -> Result:
    """Sec. 3.2: x_fused = sum over the inattentive tokens of a_i x_i."""
    attention = cls_row(step.records[-1], image)
    order = np.argsort(-attention, kind="stable")
    attentive, inattentive = order[: step.group.keep - 1], order[step.group.keep - 1 :]
    kept = np.sort(order[: step.group.keep])
    rows = []
    for token in kept:
        row = np.zeros(len(attention))
        if token in attentive:
            row[token] = 1
        else:
            row[inattentive] = attention[inattentive]
        rows.append(row)
    return kept, np.stack(rows)


def tome(method: Any, step: Any, image: int) -> Result:
    keys = array(step.records[-1].key)[image].mean(0)[1:]
    sizes = np.ones(len(keys)) if step.sizes is None else array(step.sizes)[image]
    order = list(range(len(keys)))
    if step.order is not None and not method.spatial_order:
        order = array(step.order)[image].tolist()
    # CLS is token 0 of the tower's alternation, so that the first patch belongs to set B.
    return matching(keys, step.group.keep, sizes, a=order[1::2], b=order[::2])


def matching(metric: np.ndarray, keep: int, sizes: np.ndarray, a: list[int], b: list[int]) -> Result:
    """Bipartite soft matching: each of A draws an edge to the most similar of B; the r best edges are merged."""
    metric = unit(metric)
    edges = []
    for token in a:
        similarity = [float(metric[token] @ metric[other]) for other in b]
        edges.append((max(similarity), token, b[int(np.argmax(similarity))]))
    edges.sort(key=lambda edge: -edge[0])
    groups = {token: [token] for token in range(len(metric))}
    for _, token, partner in edges[: len(metric) - keep]:
        groups[partner].append(token)
        del groups[token]
    kept = np.array(sorted(groups))
    mixture = np.zeros((keep, len(metric)))
    for row, token in enumerate(kept):
        for member in groups[token]:
            mixture[row, member] = sizes[member] / sum(sizes[m] for m in groups[token])
    return kept, mixture


def spatial_pooling(method: Any, step: Any, image: int) -> Result:
    """Adaptive average pooling: cell (i, j) of n x n covers floor(i R / n) to ceil((i + 1) R / n)."""
    rows, columns = step.grid
    tall = max(t for t in range(1, int(step.keep**0.5) + 1) if step.keep % t == 0)
    wide = step.keep // tall
    found = []
    for i in range(tall):
        for j in range(wide):
            ys = range(int(np.floor(i * rows / tall)), int(np.ceil((i + 1) * rows / tall)))
            xs = range(int(np.floor(j * columns / wide)), int(np.ceil((j + 1) * columns / wide)))
            row = np.zeros(rows * columns)
            for y in ys:
                for x in xs:
                    row[y * columns + x] = 1 / (len(ys) * len(xs))
            found.append((((ys[0] + ys[-1]) // 2) * columns + (xs[0] + xs[-1]) // 2, row))
    found.sort(key=lambda cell: cell[0])
    return np.array([middle for middle, _ in found]), np.stack([row for _, row in found])


def prumerge(method: Any, step: Any, image: int) -> Result:
    """Attention is one head as wide as all together; what goes becomes one more token, where the best of it stood."""
    record = step.records[-1]
    query, key = array(record.query)[image, :, 0, 0].flatten(), array(record.key)[image]
    key = key.transpose(1, 0, 2).reshape(key.shape[1], -1)
    attention = softmax(key @ query / len(query) ** 0.5)[1:]
    keys, tokens = unit(key[1:]), len(attention)
    q1, q3 = np.quantile(attention, 0.25), np.quantile(attention, 0.75)
    outliers = max(1, int((attention > q3 + 1.5 * (q3 - q1)).sum()))
    budget = max(1, step.keep - 1)
    stays = set(top(attention, min(budget, outliers)).tolist())
    if method.adaptive:
        stride = max(1, int(1 / (outliers / tokens)) // 3)
        rest = [patch for patch in range(0, tokens - 1, stride) if patch not in stays]
        fill = min(budget - len(stays), len(rest))
    else:
        rest = [patch for patch in range(tokens) if patch not in stays]
        fill = budget - len(stays)
    for index in range(fill):
        stays.add(rest[(2 * index + 1) * len(rest) // (2 * fill)])
    rows = {}
    for patch in stays:
        rows[patch] = np.eye(tokens)[patch]
        similarity = keys @ keys[patch]
        others = [other for other in np.argsort(-similarity, kind="stable") if other != patch]
        for other in others[: method.neighbours]:
            rows[patch][other] += attention[other]
    gone = [patch for patch in range(tokens) if patch not in stays]
    if step.keep > 1:
        rows[max(gone, key=lambda patch: attention[patch])] = np.where(np.isin(np.arange(tokens), gone), attention, 0)
    kept = np.array(sorted(rows))
    return kept, np.stack([rows[patch] for patch in kept])


def visionzip(method: Any, step: Any, image: int) -> Result:
    """The last column of the mixture is CLS, in the place of the best patch that is neither dominant nor a target."""
    record = step.records[-2]
    attention, keys = cls_row(record, image), unit(array(record.key)[image].mean(0)[1:])
    tokens = len(attention)
    contextual = round(step.keep * 10 / 64) if method.contextual is None else method.contextual
    with_cls = method.keep_cls and contextual < step.keep
    dominant = top(attention, step.keep - contextual - with_cls)
    rest = [patch for patch in range(tokens) if patch not in dominant]
    targets = [rest[i * (len(rest) // contextual)] for i in range(contextual)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for patch in rest:
        if patch not in targets and targets:
            joined[targets[int(np.argmax([keys[patch] @ keys[target] for target in targets]))]].append(patch)
    rows = {int(patch): np.eye(tokens + 1)[patch] for patch in [*dominant, *targets]}
    for target, members in joined.items():
        for member in members:
            rows[target][member] = 1 / len(members)
    if with_cls:
        rows[max((patch for patch in rest if patch not in targets), key=lambda patch: attention[patch])] = np.eye(
            tokens + 1
        )[tokens]
    kept = np.array(sorted(rows))
    return kept, np.stack([rows[patch] for patch in kept])[:, : tokens + with_cls]


def divprune(method: Any, step: Any, image: int) -> Result:
    features = unit(array(step.projected)[image])
    distance = 1 - features @ features.T
    tokens = len(features)
    nearest = [min(distance[i, j] for j in range(tokens) if j != i) for i in range(tokens)]
    picked = [int(np.argmax(nearest))]
    while len(picked) < step.keep:
        gaps = [-np.inf if i in picked else min(distance[i, j] for j in picked) for i in range(tokens)]
        picked.append(int(np.argmax(gaps)))
    return np.sort(picked), None


def cen_divprune(method: Any, step: Any, image: int) -> Result:
    """Eq. 3 to 7 of Cen-Prune: DivPrune's first token, then distance of centred features times distinctiveness."""
    features = array(step.projected)[image]
    centred, tokens = unit(features - features.mean(0)), len(features)
    distance, distinct = 1 - centred @ centred.T, distinctive(features)
    nearest = [min(distance[i, j] for j in range(tokens) if j != i) for i in range(tokens)]
    picked = [int(np.argmax(nearest))]
    while len(picked) < step.keep:
        gains = [-np.inf if i in picked else distinct[i] * distance[i, picked].min() for i in range(tokens)]
        picked.append(int(np.argmax(gains)))
    return np.sort(picked), None


def distinctive(features: np.ndarray) -> np.ndarray:
    """Minus the mean cosine with all other tokens, stretched to 0 … 1."""
    similarity = unit(features) @ unit(features).T
    scores = np.array([-np.delete(row, i).mean() for i, row in enumerate(similarity)])
    return (scores - scores.min()) / (scores.max() - scores.min())


def cen_cdpruner(method: Any, step: Any, row: int, image: int) -> Result:
    features = array(step.features)[row, image]
    quality = relevance_of(method, step, row, image) * distinctive(features)
    return np.sort(by_determinants(quality, features - features.mean(0), step.keep)), None


def cdpruner(method: Any, step: Any, row: int, image: int) -> Result:
    """The greedy maximum of det(L_S), each step by the determinants themselves."""
    quality = relevance_of(method, step, row, image)
    return np.sort(by_determinants(quality, array(step.features)[row, image], step.keep)), None


def relevance_of(method: Any, step: Any, row: int, image: int) -> np.ndarray:
    patches, text = unit(array(step.patch_embeds)[row, image]), unit(array(step.text_embeds)[row])
    windows = [w for w in range(len(text)) if step.windows[row, w]]
    relevance = np.array([np.mean([patch @ text[w] for w in windows]) for patch in patches])
    relevance = -relevance if method.negated else relevance
    return (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)


def by_determinants(quality: np.ndarray, features: np.ndarray, keep: int) -> list[int]:
    """Each next token has the largest determinant with those picked."""
    kernel = quality[:, None] * (unit(features) @ unit(features).T) * quality[None]
    picked: list[int] = []
    while len(picked) < keep:
        gain = []
        for token in range(len(kernel)):
            chosen = [*picked, token]
            sign, value = np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])
            gain.append(value if token not in picked and sign > 0 else -np.inf)
        picked.append(int(np.argmax(gain)))
    return picked


def vispruner(method: Any, step: Any, image: int) -> Result:
    """Duplicates go, eight in a round: of one half of the patches those with the nearest one in the other half."""
    attention, features = cls_row(step.records[-2], image), unit(array(step.features)[image])
    order = [int(patch) for patch in np.argsort(-attention, kind="stable")]
    important = int(step.keep * method.important_ratio)
    kept, rest = order[:important], order[important:]
    while len(rest) > step.keep - important > 0:
        one, other = rest[::2], rest[1::2]
        near = sorted(one, key=lambda patch: -max(features[patch] @ features[mate] for mate in other))
        rest = near[min(8, len(rest) - (step.keep - important), len(one)) :] + other
    return np.sort(kept if important == step.keep else kept + rest), None


def prunesid(method: Any, step: Any, image: int) -> Result:
    """Groups are eigenvectors of the patches' covariance; inside each a non-maximum suppression."""
    attention, features, keep = cls_row(step.records[-2], image), array(step.features)[image], step.keep
    tokens, number = len(attention), max(1, keep // 4)
    values = 1 / (1 + np.exp(-features))
    values = values - values.mean(1, keepdims=True)
    components = np.linalg.eigh(values @ values.T)[1][:, ::-1][:, :number]
    group = np.argmax(np.abs(components), axis=1)
    similarity = unit(features) @ unit(features).T
    threshold = np.mean([similarity[i, j] for i in range(tokens) for j in range(i)]) * keep / 32
    members, picked = [], []
    for g in range(number):
        left = sorted(np.flatnonzero(group == g), key=lambda patch: -attention[patch])
        members.append(list(left))
        picked.append([])
        while left:
            picked[g].append(left[0])
            left = [patch for patch in left[1:] if similarity[left[0], patch] <= threshold]
    with_cls = method.keep_cls and keep > 1
    most = [min(5 * int(np.ceil(keep / 64)), len(kept)) for kept in picked]
    while sum(most) < keep:
        most = [min(limit + 1, len(of)) for limit, of in zip(most, members, strict=True)]
    number_of_groups = sum(bool(of) for of in members)
    others = max(0, keep - with_cls - number_of_groups)
    ends = np.round(np.cumsum([len(kept) for kept in picked]) / sum(map(len, picked)) * others).astype(int)
    given = np.diff([0, *ends]) + [int(bool(of)) for of in members]
    given = np.minimum(given, most)
    for g in sorted(range(number), key=lambda g: -len(picked[g])):
        given[g] += min(most[g] - given[g], others + number_of_groups - given.sum())
    kept = []
    for g in range(number):
        kept += [*picked[g], *(patch for patch in members[g] if patch not in picked[g])][: given[g]]
    if not with_cls:
        return np.sort(kept), None
    rows = {int(patch): np.eye(tokens + 1)[patch] for patch in kept}
    rows[max((p for p in range(tokens) if p not in rows), key=lambda p: attention[p])] = np.eye(tokens + 1)[tokens]
    order = np.array(sorted(rows))
    return order, np.stack([rows[patch] for patch in order])


def vscan(method: Any, step: Any, image: int) -> Result:
    """Eq. 2 to 4: the best of each window in a shallow layer, then the best of all in a deep one; the rest merged."""
    shallow, deep = cls_row(step.records[method.local_layer - 1], image), cls_row(step.records[-2], image)
    features, (rows, columns) = unit(array(step.projected)[image]), step.grid
    windows, tokens = method.windows, len(deep)
    kept: list[int] = []
    for i in range(windows):
        for j in range(windows):
            ys = range(i * rows // windows, (i + 1) * rows // windows)
            xs = range(j * columns // windows, (j + 1) * columns // windows)
            inside = sorted((y * columns + x for y in ys for x in xs), key=lambda patch: (-shallow[patch], patch))
            kept += inside[: int(step.keep * method.local_ratio) // windows**2]
    others = [int(patch) for patch in np.argsort(-deep, kind="stable") if patch not in kept]
    kept = sorted(kept + others[: step.keep - len(kept)])
    rows_of = {patch: [patch] for patch in kept}
    for patch in range(tokens):
        if patch not in rows_of:
            rows_of[kept[int(np.argmax([features[patch] @ features[mate] for mate in kept]))]].append(patch)
    return np.array(kept), np.stack(
        [np.isin(np.arange(tokens), rows_of[patch]) / len(rows_of[patch]) for patch in kept]
    )


def optimal_set(method: Any, relevance: np.ndarray, states: np.ndarray, keep: int, weights: Any) -> Result:
    """Eq. 6 and 7 of TOPS from the start at every step, as its Algorithms 1 and 2 normalise or as its Sec. 4.1 does."""
    similarity = unit(states) @ unit(states).T
    picked = [int(np.argmax(relevance))]
    while len(picked) < keep:
        rest = [token for token in range(len(relevance)) if token not in picked]
        near = similarity[np.ix_(rest, picked)].max(1)
        covers = [np.maximum(0, similarity[i, rest] - near).sum() for i in rest]
        criteria = [relevance[rest], 1 - near, covers]
        score = np.zeros(len(rest))
        for weight, values in zip((1.0, *weights), np.array(criteria), strict=True):
            if method.normalization == "minmax":
                values = (values - values.min()) / max(np.ptp(values), 1e-300)
            else:
                values = values / max(values.mean(), 1e-300)
            score += weight * values
        picked.append(rest[int(np.argmax(score))])
    return np.sort(picked), None


def tops(method: Any, step: Any, image: int) -> Result:
    attention = cls_row(step.records[-2], image)
    return optimal_set(method, attention, array(step.projected)[image], step.keep, (0.5, 0.5))


def mean_map(record: Any, image: int) -> np.ndarray:
    """The mean row of softmax(Q K^T / sqrt(d)) over heads and all tokens, without the entry of CLS."""
    query, key = array(record.query)[image, :, 0], array(record.key)[image]
    rows = [softmax(key[h] @ token * record.scale) for h in range(len(key)) for token in query[h]]
    return np.mean(rows, axis=0)[1:]


def hiprune(method: Any, step: Any, image: int) -> Result:
    middle = mean_map(step.records[method.object_layer - 1], image)
    deep, (rows, columns) = mean_map(step.records[-2], image), step.grid
    kept: set[int] = set()
    for anchor in np.argsort(-middle, kind="stable")[: min(round(step.keep * method.alpha / 5), step.keep // 5)]:
        y, x = divmod(int(anchor), columns)
        if method.wrap:
            near = [anchor + move for move in (0, -1, 1, -columns, columns)]
            kept |= {min(max(int(patch), 0), len(deep) - 1) for patch in near}
        else:
            cells = [(y, x), (y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
            kept |= {i * columns + j for i, j in cells if 0 <= i < rows and 0 <= j < columns}
    registers = [int(patch) for patch in np.argsort(-deep, kind="stable") if patch not in kept]
    return np.sort([*kept, *registers[: step.keep - len(kept)]]), None


def spanning(scores: np.ndarray, features: np.ndarray, keep: int, sharpness: float | None) -> np.ndarray:
    """The longest of the vectors q_i u_i first; then each that is longest when the others' directions are taken out."""
    stretched = (scores - scores.min()) / (scores.max() - scores.min())
    weights = stretched ** (0.25 if sharpness is None else sharpness)
    vectors, least = unit(features) * weights[:, None], len(scores) * np.finfo(float).eps * weights.max() ** 2
    picked: list[int] = []
    while len(picked) < keep:
        # Unit vectors are of equal length, whatever rounding makes of it.
        lengths = np.square(vectors).sum(1) if picked else weights**2
        lengths[picked] = -1
        if lengths.max() <= least:
            picked += [int(token) for token in np.argsort(-scores, kind="stable") if token not in picked]
            break
        picked.append(int(lengths.argmax()))
        direction = vectors[picked[-1]] / np.sqrt(lengths.max())
        vectors = vectors - np.outer(vectors @ direction, direction)
    return np.sort(picked[:keep])


def rolled_row(records: Any, at: tuple[int, ...], image: int) -> np.ndarray:
    """Eq. 3 for the reference token of an image, over the tracked tokens: the row of the top layer, and maps below."""
    row: Any = None
    for record in records[::-1]:
        query, keys = array(record.query)[at[0], :, image], array(record.key)[at[0]]
        keys = np.repeat(keys, len(query) // len(keys), axis=0)
        logits = query @ keys.transpose(0, 2, 1) * record.scale
        if record.visible is not None:
            logits[:, ~array(record.visible)[at[0], image][: logits.shape[1]]] = -np.inf
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        attention = (powers / powers.sum(-1, keepdims=True)).mean(0)
        if record.columns is not None:
            attention = attention[:, array(record.columns)[at[0], image]]
        identity = np.eye(attention.shape[1])[: len(attention)]
        weights = attention if record is records[0] else (attention + identity) / 2
        row = weights[0] if row is None else row @ weights
    return row


def ivtp_in_tower(pruner: Any, step: Any, image: int) -> Result:
    row, patches = rolled_row(step.records, (image,), 0)[1:], len(step.patches[image])
    scores = len(step.records) * patches / step.total * row
    if step.carried is not None:
        scores = scores + array(step.carried)[image]
    keys = np.concatenate(array(step.records[-1].key)[image], axis=1)[1:]
    return spanning(scores, keys, step.group.keep, pruner.options.sharpness), None


def ivtp_in_decoder(pruner: Any, step: Any, row: int, image: int) -> Result:
    columns, top_record = visual_columns(step.sequence, row, image), step.records[-1]
    values = array(top_record.value)[row][:, array(top_record.value_columns)[row, image]]
    weighted = rolled_row(step.records, (row,), image)[1:] * np.sqrt(np.square(values).sum((0, 2)))
    scores = weighted / weighted.sum()
    return spanning(scores, array(step.hidden)[row][columns], step.group.keep, pruner.options.sharpness), None


def ivtp_late(pruner: Any, step: Any, image: int) -> Result:
    depth = len(step.records)
    scores = sum(cls_row(step.records[layer], image) for layer in range(depth))
    keys = np.concatenate(array(step.records[depth - 1].key)[image], axis=1)[1:]
    return spanning(scores, keys, step.keep, pruner.method.sharpness), None


class Reader:
    """One layer's attention over the prompt of one row, head by head, causal and without padding."""

    def __init__(self, record: Any, sequence: Any, row: int) -> None:
        self.query, self.key = array(record.query)[row], array(record.key)[row]
        self.key = np.repeat(self.key, len(self.query) // len(self.key), axis=0)
        self.past, self.scale = record.past, record.scale
        self.valid = np.ones(self.key.shape[1], dtype=bool)
        if sequence.valid is not None:
            self.valid[self.past :] = array(sequence.valid)[row]

    def attention(self, column: int) -> np.ndarray:
        """Mean over heads of what a column pays the sequence's columns."""
        sees = self.valid & (np.arange(self.key.shape[1]) <= self.past + column)
        rows = []
        for query, key in zip(self.query, self.key, strict=True):
            logits = np.where(sees, key @ query[column] * self.scale, -np.inf)
            rows.append(softmax(logits))
        return np.mean(rows, axis=0)[self.past :]


def visual_columns(sequence: Any, row: int, image: int) -> np.ndarray:
    columns = array(sequence.columns)[row, image]
    return columns[columns < sequence.size]


def text_after(sequence: Any, row: int, image: int) -> list[int]:
    visual = set(array(sequence.columns)[row].flatten().tolist())
    valid = None if sequence.valid is None else array(sequence.valid)[row]
    last = visual_columns(sequence, row, image).max()
    text = [c for c in range(last + 1, sequence.size) if c not in visual and (valid is None or valid[c])]
    return text or [sequence.size - 1]


def fastv(method: Any, step: Any, row: int, image: int) -> Result:
    reader = Reader(step.decoder_records[-1], step.sequence, row)
    received = reader.attention(step.sequence.size - 1)[visual_columns(step.sequence, row, image)]
    return top(received, step.group.keep), None


def pyramiddrop(method: Any, step: Any, row: int, image: int) -> Result:
    record = step.next_record if method.next_layer else step.decoder_records[-1]
    received = Reader(record, step.sequence, row).attention(step.sequence.size - 1)
    return top(received[visual_columns(step.sequence, row, image)], step.group.keep), None


def vscan_in_decoder(method: Any, step: Any, row: int, image: int) -> Result:
    received = Reader(step.next_record, step.sequence, row).attention(step.sequence.size - 1)
    return top(received[visual_columns(step.sequence, row, image)], step.group.keep), None


def tops_in_decoder(method: Any, step: Any, row: int, image: int) -> Result:
    """Raters are the text tokens after the image that attend to it at least as much as the mean of them."""
    sequence, columns = step.sequence, visual_columns(step.sequence, row, image)
    reader = Reader(step.decoder_records[-1], sequence, row)
    rows = np.stack([reader.attention(column)[columns] for column in text_after(sequence, row, image)])
    relevance = rows[rows.sum(1) >= rows.sum(1).mean() - 1e-9].mean(0)
    weights = method.diversity, method.coverage
    return optimal_set(method, relevance, array(step.hidden)[row][columns], step.group.keep, weights)


def text_attention(method: Any, step: Any, row: int, image: int) -> Result:
    weights = method.weights or [1.0] * len(step.decoder_records)
    text = text_after(step.sequence, row, image)
    if method.readers == "instruction" and step.instruction is not None:
        text = [column for column in text if step.instruction[row, column]] or text
    if method.readers == "vision":
        text = list(visual_columns(step.sequence, row, image))
    total = 0
    for weight, record in zip(weights, step.decoder_records, strict=True):
        reader = Reader(record, step.sequence, row)
        total = total + weight / sum(weights) * np.mean([reader.attention(column) for column in text], axis=0)
    return top(total[visual_columns(step.sequence, row, image)], step.group.keep), None


def raters(sequence: Any, embeds: np.ndarray, row: int, image: int) -> list[int]:
    """Text tokens whose mean softmaxed product with the visual tokens is at least the mean."""
    text, visual = text_after(sequence, row, image), visual_columns(sequence, row, image)
    share = np.mean([softmax(embeds[text] @ embeds[column]) for column in visual], axis=0)
    return [column for column, similarity in zip(text, share, strict=True) if similarity >= share.mean()]


def sparsevlm(method: Any, step: Any, row: int, image: int) -> Result:
    sequence, columns = step.sequence, visual_columns(step.sequence, row, image)
    slots = array(sequence.slots)[row]
    rating = [c for c in range(sequence.size) if slots[c] < sequence.length and step.state[row, image, slots[c]]]
    reader = Reader(step.decoder_records[-1], sequence, row)
    rated = np.stack([reader.attention(column)[columns] for column in rating])
    scores, tokens, keep = rated.mean(0), len(columns), min(step.group.keep, len(columns))
    rank = np.linalg.matrix_rank(rated)
    if method.adaptive and rank < len(rating) < tokens:
        keep = max(1, tokens - round((tokens - keep) / (tokens - len(rating)) * (tokens - rank)))
    order = np.argsort(-scores, kind="stable")
    clusters = 0
    for number in range(1, keep if method.recycle else 0):
        recycled = int(0.3 * (tokens - keep + number)) + 1
        if recycled >= number and int(recycled / 10) + 1 <= number:
            clusters = number
            break
        if recycled < number:
            break
    if not clusters:
        return np.sort(order[:keep]), None
    stays = order[: keep - clusters]
    pool = np.sort(order[keep - clusters :][: int(0.3 * (tokens - keep + clusters)) + 1])
    points = array(step.hidden)[row][columns[pool]]
    distance = np.array([[np.linalg.norm(p - q) for q in points] for p in points]) / points.shape[1] ** 0.5
    density = np.array([np.exp(-np.mean(np.sort(line)[:clusters] ** 2)) for line in distance])
    apart = []
    for i in range(len(pool)):
        denser = [j for j in range(len(pool)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart.append(min((distance[i, j] for j in denser), default=distance.max()))
    centres = np.argsort(-(np.array(apart) * density), kind="stable")[:clusters]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in range(len(pool)):
        near = i if i in members else centres[int(np.argmin([distance[i, centre] for centre in centres]))]
        members[near].append(i)
    rows = {int(token): np.eye(tokens)[token] for token in stays}
    for centre, of in members.items():
        rows[int(pool[centre])] = np.isin(np.arange(tokens), pool[of]) / len(of)
    kept = np.array(sorted(rows))
    return kept, np.stack([rows[token] for token in kept])


def tome_plus(method: Any, step: Any, row: int, image: int) -> Result:
    record = step.decoder_records[-1]
    keys = array(record.key)[row].mean(0)[record.past :][visual_columns(step.sequence, row, image)]
    sizes = np.ones(len(keys)) if step.sizes is None else array(step.sizes)[row, image]
    order = list(range(len(keys)))
    if step.order is not None and not method.spatial_order:
        order = array(step.order)[row, image].tolist()
    return matching(keys, step.group.keep, sizes, a=order[::2], b=order[1::2])


def lvpruning(method: Any, step: Any, row: int, image: int) -> Result:
    hidden = array(step.hidden)[row]
    mean = hidden[text_after(step.sequence, row, image)].mean(0)
    visual = hidden[visual_columns(step.sequence, row, image)]
    return top(unit(visual) @ unit(mean), step.group.keep), None


def atp(method: Any, step: Any, row: int, image: int) -> Result:
    """Eq. 3 and 4, and a uniform sample of the grid that always stays."""
    record, columns = step.decoder_records[-1], visual_columns(step.sequence, row, image)
    reader = Reader(record, step.sequence, row)
    logits = np.zeros(len(columns))
    for query, key in zip(reader.query, reader.key, strict=True):
        products = query[columns] @ key[reader.past + columns].T * record.scale
        logits += products.mean(0) / len(reader.query)
    cross = np.mean([reader.attention(column)[columns] for column in text_after(step.sequence, row, image)], axis=0)
    score = (logits + cross) / 2
    number = round(method.spatial * step.group.keep)
    sample = [(2 * index + 1) * len(columns) // (2 * number) for index in range(number)]
    order = [token for token in np.argsort(-score, kind="stable") if token not in sample]
    return np.sort([*sample, *order[: step.group.keep - number]]), None


BY_IMAGE: dict[tuple[str, str], Callable[..., Result]] = {
    ("topk", "in_tower"): topk,
    ("topk+", "in_tower"): topk,
    ("evit", "in_tower"): evit,
    ("tome", "in_tower"): tome,
    ("tome+", "in_tower"): tome,
    ("spatial_pooling", "in_features"): spatial_pooling,
    ("prumerge+", "in_features"): prumerge,
    ("visionzip", "in_features"): visionzip,
    ("divprune", "in_features"): divprune,
    ("hiprune", "in_features"): hiprune,
    ("vispruner", "in_features"): vispruner,
    ("ivtp-extended", "in_tower"): ivtp_in_tower,
    ("ivtp-extended-flat", "in_tower"): ivtp_in_tower,
    ("ivtp-extended-late", "in_features"): ivtp_late,
    ("prunesid", "in_features"): prunesid,
    ("vscan", "in_features"): vscan,
    ("tops", "in_features"): tops,
    ("cen-divprune", "in_features"): cen_divprune,
}
"""Methods at steps of single images."""

BY_ROW: dict[tuple[str, str], Callable[..., Result]] = {
    ("cdpruner", "in_prompt"): cdpruner,
    ("cen-cdpruner", "in_prompt"): cen_cdpruner,
    ("ivtp-extended", "in_decoder"): ivtp_in_decoder,
    ("topk+", "in_decoder"): topk_plus,
    ("tome+", "in_decoder"): tome_plus,
    ("text_attention", "in_decoder"): text_attention,
    ("fastv", "in_decoder"): fastv,
    ("pyramiddrop", "in_decoder"): pyramiddrop,
    ("vscan", "in_decoder"): vscan_in_decoder,
    ("tops", "in_decoder"): tops_in_decoder,
    ("sparsevlm", "in_decoder"): sparsevlm,
    ("lvpruning-topk", "in_decoder"): lvpruning,
    ("atp-spatial", "in_decoder"): atp,
}
"""Methods at steps of the rows of a batch."""
