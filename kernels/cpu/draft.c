/* Drafts of an MTP head, token after token. */
#include "api.h"

#include <stdlib.h>

/* Those sequences that go on; what they hold is in the order of `of`, the numbers of these. */
typedef struct {
    int num, *of;
    Span *spans;
    int32_t *tokens;
    float **given, *hidden, *outputs, *logits, *together;
} Drafting;

/* Chooses a token for each, and parts with those that have enough. -1 when memory ran out. */
static int choose_tokens(Drafting *d, int64_t width, int64_t size, const Wanted *wanted, int most, int32_t *tokens, float *shares, int32_t *counts) {
    int num_left = 0;
    for (int j = 0; j < d->num; j++) {
        int i = d->of[j], at = i * most + counts[i]++;
        const float *logits = d->logits + j * size;
        int64_t position = d->spans[j].position + d->spans[j].num_rows, token = 0;
        if (wanted[i].sampling.temperature > 0) {
            if (forerun_draw(logits, 1, size, &wanted[i].sampling, (uint64_t)position, &token)) return -1;
        } else
            for (int64_t k = 1; k < size; k++) token = logits[k] > logits[token] ? k : token;
        tokens[at] = (int32_t)token, shares[at] = kernels->share(logits, size, token);
        d->together[i] *= shares[at];
        if (counts[i] >= wanted[i].limit || shares[at] < wanted[i].least || d->together[i] < wanted[i].floor) continue;
        memcpy(d->hidden + num_left * width, d->outputs + j * width, (size_t)width * sizeof *d->hidden);
        d->spans[num_left] = d->spans[j];
        d->spans[num_left].position = position, d->spans[num_left].num_rows = 1;
        d->tokens[num_left] = (int32_t)token, d->of[num_left++] = i;
    }
    d->num = num_left;
    return 0;
}

int forerun_draft(const Call *first, int num_threads, HeadBuffers of, const Wanted *wanted, int most, int32_t *tokens, float *shares,
                  int32_t *counts) {
    int num = first->num_spans, status;
    int64_t width = first->widths[of.out], size = first->widths[of.logits];
    Call call = *first;
    Drafting d = {.num = num};
    d.of = malloc((size_t)num * sizeof *d.of), d.spans = malloc((size_t)num * sizeof *d.spans);
    d.tokens = malloc((size_t)num * sizeof *d.tokens), d.given = malloc((size_t)call.num_buffers * sizeof *d.given);
    d.hidden = malloc((size_t)(num * (2 * width + size + 1)) * sizeof *d.hidden);
    status = d.of && d.spans && d.tokens && d.given && d.hidden ? 0 : -1;
    if (!status) {
        d.outputs = d.hidden + num * width, d.logits = d.outputs + num * width, d.together = d.logits + num * size;
        memcpy(d.spans, first->spans, (size_t)num * sizeof *d.spans);
        memcpy(d.given, first->given, (size_t)call.num_buffers * sizeof *d.given);
        for (int i = 0; i < num; i++) d.of[i] = i, d.together[i] = 1, counts[i] = 0;
        d.given[of.out] = d.outputs, d.given[of.logits] = d.logits, call.given = d.given, call.spans = d.spans;
    }
    while (!status && d.num) {
        status = forerun_run(&call, num_threads);
        if (!status) status = choose_tokens(&d, width, size, wanted, most, tokens, shares, counts);
        call.tokens = d.tokens, call.num_spans = call.num_rows = d.num, d.given[of.hidden] = d.hidden;
    }
    free(d.of), free(d.spans), free(d.tokens), free(d.given), free(d.hidden);
    return status;
}
