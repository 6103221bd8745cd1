/* Softmax cross-entropy of rows of logits, and its gradient in their place; ../loss.py has the formulas.

   Legend: N rows, V vocabulary. */

/* losses[i] = w_i (logsumexp(row) - row[label]); where `gradient`, the row becomes w_i (softmax(row) - onehot(label)).
   `weights` may be NULL: 1 each. */
EXPORT int NAME(cross_entropy)(element *logits, const int64_t *labels, const float *weights, float *losses, long N,
                                long V, long gradient) {
#pragma omp parallel for if (N * V > ALONE) schedule(dynamic, 4)
    for (long n = 0; n < N; n++) {
        element *row = logits + n * V;
        float weight = weights ? weights[n] : 1.0f, most = NAME(widen)(row[0]);
        double sum = 0.0; /* of floats over a thousand numbers each: small ones would be lost in a long float sum */
#pragma omp simd reduction(max : most)
        for (long i = 0; i < V; i++) most = NAME(widen)(row[i]) > most ? NAME(widen)(row[i]) : most;
        for (long from = 0; from < V; from += 1024) {
            long to = V - from < 1024 ? V : from + 1024;
            float part = 0.0f;
            for (long i = from; i < to; i++) part += exponential(NAME(widen)(row[i]) - most);
            sum += part;
        }
        float norm = most + (float)log(sum), right = NAME(widen)(row[labels[n]]);
        losses[n] = weight * (norm - right);
        if (!gradient) continue;
        for (long i = 0; i < V; i++) row[i] = NAME(narrow)(weight * exponential(NAME(widen)(row[i]) - norm));
        row[labels[n]] = NAME(narrow)(weight * (exponential(right - norm) - 1.0f));
    }
    return 0;
}
