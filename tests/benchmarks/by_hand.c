/* W1 as one writes it by hand: descend on the mean of (w x + b - y)^2 over rows gathered by index. */

#include <stdint.h>

void train(int64_t steps, const int64_t *index, const float *x, const float *y, float lr, float w, float b,
           float *losses) {
    for (int64_t t = 0; t < steps; t++) {
        float loss = 0, slope_w = 0, slope_b = 0;
        for (int64_t i = 0; i < BATCH; i++) {
            int64_t row = index[t * BATCH + i];
            float error = w * x[row] + b - y[row];
            loss += error * error;
            slope_w += error * x[row];
            slope_b += error;
        }
        losses[t] = loss / BATCH;
        w -= lr * (2.0f / BATCH) * slope_w;
        b -= lr * (2.0f / BATCH) * slope_b;
    }
}
