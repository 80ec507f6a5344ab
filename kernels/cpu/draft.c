/* Drafts of an MTP head, token after token. */
#include "api.h"

#include <stdlib.h>

/* Those sequences that go on, in the order of their numbers `of`. */
typedef struct {
    int num, *of;
    Span *spans;
    Sampling *sampling;
    uint64_t *positions;
    int64_t *chosen;
    int32_t *tokens;
    float **given, *hidden, *outputs, *logits, *together;
} Drafting;

/* Chooses a token for each, and parts with those that have enough. -1 when memory ran out. */
static int choose_tokens(Drafting *d, int64_t width, int64_t size, const Wanted *wanted, int most, int32_t *tokens, float *shares, int32_t *counts) {
    int num_left = 0;
    for (int j = 0; j < d->num; j++) {
        d->sampling[j] = wanted[d->of[j]].sampling;
        d->positions[j] = (uint64_t)(d->spans[j].position + d->spans[j].num_rows);
    }
    if (forerun_draw(d->logits, d->num, size, d->sampling, d->positions, d->chosen)) return -1;
    for (int j = 0; j < d->num; j++) {
        int i = d->of[j], at = i * most + counts[i]++;
        tokens[at] = (int32_t)d->chosen[j], shares[at] = kernels->share(d->logits + j * size, size, d->chosen[j]);
        d->together[i] *= shares[at];
        if (counts[i] >= wanted[i].limit || shares[at] < wanted[i].least || d->together[i] < wanted[i].floor) continue;
        memmove(d->hidden + num_left * width, d->outputs + j * width, (size_t)width * sizeof *d->hidden);
        d->spans[num_left] = d->spans[j];
        d->spans[num_left].position = (int64_t)d->positions[j], d->spans[num_left].num_rows = 1;
        d->tokens[num_left] = tokens[at], d->of[num_left++] = i;
    }
    d->num = num_left;
    return 0;
}

/* Lays out what is needed at `base` or, to learn how much that is, at NULL. Returns its bytes. */
static size_t lay_out(Drafting *d, char *base, int num_buffers, int64_t width, int64_t size) {
    size_t at = 0;
#define TAKE(to, count)                                        \
    do {                                                       \
        if (base) (to) = (void *)(base + at);                  \
        at += ((size_t)(count) * sizeof *(to) + 63) / 64 * 64; \
    } while (0)
    TAKE(d->of, d->num);
    TAKE(d->spans, d->num);
    TAKE(d->sampling, d->num);
    TAKE(d->positions, d->num);
    TAKE(d->chosen, d->num);
    TAKE(d->tokens, d->num);
    TAKE(d->given, num_buffers);
    TAKE(d->hidden, d->num * width);
    TAKE(d->outputs, d->num * width);
    TAKE(d->logits, d->num * size);
    TAKE(d->together, d->num);
#undef TAKE
    return at;
}

int forerun_draft(const Call *first, int num_threads, HeadBuffers of, const Wanted *wanted, int most, int32_t *tokens, float *shares,
                  int32_t *counts) {
    int64_t width = first->widths[of.out], size = first->widths[of.logits];
    Call call = *first;
    Drafting d = {.num = first->num_spans};
    char *memory = malloc(lay_out(&d, NULL, call.num_buffers, width, size));
    if (!memory) return -1;
    lay_out(&d, memory, call.num_buffers, width, size);
    memcpy(d.spans, first->spans, (size_t)d.num * sizeof *d.spans);
    memcpy(d.given, first->given, (size_t)call.num_buffers * sizeof *d.given);
    for (int i = 0; i < d.num; i++) d.of[i] = i, d.together[i] = 1, counts[i] = 0;
    d.given[of.out] = d.outputs, d.given[of.logits] = d.logits, call.given = d.given, call.spans = d.spans;
    int status = 0;
    while (!status && d.num) {
        status = forerun_run(&call, num_threads);
        if (!status) status = choose_tokens(&d, width, size, wanted, most, tokens, shares, counts);
        call.tokens = d.tokens, call.num_spans = call.num_rows = d.num, d.given[of.hidden] = d.hidden;
    }
    free(memory);
    return status;
}
