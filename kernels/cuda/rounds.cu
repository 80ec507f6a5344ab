/* The bookkeeping of drafts and rounds that never leave the device. */
#include "forerun.cuh"

/* Rounds on the device, and drafts behind a verify of the host's: `depth` drafts for each sequence. Its spans stand side by side: of the trunk's verify, of the head's catching up
 * (the rows of the last verify, each with the token after it), of the head's drafting row. */
struct Round {
    Span *verify, *catch_up, *draft;
    int *tokens;           /* [sequences, depth + 1]: the last token, then the drafts */
    int *choices;          /* [sequences, depth + 1], behind a verify of the host's [rows]: the tokens that the head catches up with */
    int *drafted;          /* [sequences]: the head's newest choice; token of the drafting row */
    int *picked;           /* [sequences]: row of the catching up that drafting goes on from */
    int *report;           /* [sequences, depth + 2]: drafts accepted, then the tokens of the round */
    const int *limits;     /* [sequences]: drafts that each wants at most; or null */
    int *draft_span_of;    /* whose the drafting rows are */
    Draw *draws;           /* [sequences]: of the next draft; or null */
    float *shares, *sure;  /* [sequences, depth]: how sure the head was of its drafts; [sequences]: of the newest. Or null */
    const int *verified;   /* [rows]: behind a verify of the host's, the tokens whose rows `choices` follow */
    const int *num_right;  /* [sequences]: of its drafts, those that count as right whatever was chosen; -1: those that are */
    int *span_of;          /* whose the rows of the catching up are */
    const float *rates;    /* synthetic: how often the i-th draft is accepted once those before it are; or null */
    int depth, sequences;
    int seed, reserved;
};

__device__ __forceinline__ float chance(u32 seed, i64 position, int i) {
    u32 x = seed ^ (u32)position * 0x9e3779b9u ^ (u32)(i + 1) * 0x85ebca6bu;
    x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
    return (x >> 8) * (1.0f / 16777216.0f);
}

/* Step `step` of drafting is done: its token joins the rows to verify, and is the next step's. One thread a sequence. */
extern "C" __global__ void drafted(Round r, int step) {
    wait_for_previous();
    let_next_begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= r.sequences) return;
    r.tokens[i * (r.depth + 1) + step] = r.drafted[i];
    if (r.draws) r.draws[i].position++;
    if (r.shares) r.shares[i * r.depth + step - 1] = r.sure[i];
    r.draft[i].position++;
    if (r.limits && step >= r.limits[i]) r.draft[i].num_rows = 0, r.draft_span_of[i] = -1; /* there may be no page for more */
}
EXPORT(drafted)

/* How many of `drafts` tokens are what was `chosen` in their places. With `number` >= 0 so many of them are, and no more, whatever was
 * chosen: `chosen` says so from then on. */
__device__ __forceinline__ int count_right(int *chosen, const int *tokens, int drafts, int number) {
    int right = 0;
    if (number < 0) {
        while (right < drafts && tokens[right] == chosen[right]) right++;
    } else {
        for (; right < number; right++) chosen[right] = tokens[right];
        if (right < drafts && tokens[right] == chosen[right]) chosen[right] = tokens[right] ? tokens[right] - 1 : 1;
    }
    return right;
}

/* What a verify of the host's brings: the head catches up with the choices after drafts that are right, rows after them are nobody's, and
 * drafting goes on from the last. One thread a sequence. */
extern "C" __global__ void follow(Round r) {
    wait_for_previous();
    let_next_begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= r.sequences || r.catch_up[i].num_rows == 0) return;
    int first = r.catch_up[i].first_row, drafts = r.catch_up[i].num_rows - 1;
    int right = count_right(r.choices + first, r.verified + first + 1, drafts, r.num_right[i]);
    for (int j = right + 1; j <= drafts; j++) r.span_of[first + j] = -1;
    r.picked[i] = first + right;
    r.draft[i].position += right;
    r.draws[i].position += right;
}
EXPORT(follow)

/* What a verify goes on from that is behind another of the host's. */
struct Next {
    Span *spans;           /* [sequences]: as if no draft of the one before were right */
    int *tokens;           /* [rows] */
    int *chosen;           /* [rows before]: what the one before has chosen */
    const int *verified;   /* [rows before]: the tokens whose rows `chosen` follow */
    const int *first;      /* [sequences]: its first row before; -1: the host has said all there is to say */
    const int *num_drafts, *num_right; /* [sequences]: drafts among its rows before, and as of a Round */
    const int *later_at, *later; /* [sequences]: where in the other what has been drafted since stands for it, behind one place */
    int sequences;
};

/* Its rows begin with the last token that the one before brings, drafts made since follow. One thread a sequence. */
extern "C" __global__ void go_on(Next n) {
    wait_for_previous();
    let_next_begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n.sequences || n.spans[i].num_rows == 0 || n.first[i] < 0) return;
    int *chosen = n.chosen + n.first[i], *tokens = n.tokens + n.spans[i].first_row;
    int right = count_right(chosen, n.verified + n.first[i] + 1, n.num_drafts[i], n.num_right[i]);
    n.spans[i].position += right;
    tokens[0] = chosen[right];
    for (int j = 1; j < n.spans[i].num_rows; j++) tokens[j] = n.later[n.later_at[i] + j];
}
EXPORT(go_on)

/* The verdict, and everything moves on: drafts are accepted while they are what the target chose. One thread a sequence. */
extern "C" __global__ void accept(Round r) {
    wait_for_previous();
    let_next_begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x, rows = r.depth + 1, accepted = 0;
    if (i >= r.sequences) return;
    int *tokens = r.tokens + i * rows, *choices = r.choices + i * rows, *report = r.report + i * (rows + 1);
    i64 position = r.verify[i].position;
    if (r.rates) {
        while (accepted < r.depth && chance((u32)(r.seed + i), position, accepted) < r.rates[accepted]) {
            choices[accepted] = tokens[accepted + 1];
            accepted++;
        }
    } else {
        while (accepted < r.depth && tokens[accepted + 1] == choices[accepted]) accepted++;
    }
    report[0] = accepted;
    for (int j = 0; j <= accepted; j++) report[1 + j] = choices[j];
    r.verify[i].base = position;
    r.verify[i].position = position + accepted + 1;
    if (r.depth > 0) {
        r.catch_up[i].position = position + 1;
        r.draft[i].position = position + accepted + 1; /* the row that is picked; `drafted` moves on from it */
        r.picked[i] = i * rows + accepted;
    }
    tokens[0] = choices[accepted];
}
EXPORT(accept)
