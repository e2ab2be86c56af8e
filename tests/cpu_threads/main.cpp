// Random problems for the CPU kernels, whose tasks run in threads of their own: a program for the thread and address sanitizers, which
// do not know those of OpenMP. Its arguments: a seed, and how many problems.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

using Random = std::mt19937;

// A new block at every request, so that who goes on using the one before is seen.
char* workspace(size_t bytes) {
  struct Block {
    char* memory = nullptr;
    ~Block() { std::free(memory); }
  };
  thread_local Block block;
  std::free(block.memory);
  block.memory = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  return block.memory;
}

void parallel(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  const int64_t threads = tasks < 4 ? tasks : 4;
  std::vector<std::thread> running;
  for (int64_t first = 0; first < threads; ++first)
    running.emplace_back([=] {
      for (int64_t task = first; task < tasks; task += threads) body(context, task);
    });
  for (std::thread& thread : running) thread.join();
}

const kan::Runtime runtime{4, parallel, workspace};

int64_t one_of(Random& random, std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; }

template <class T> std::vector<T> numbers(Random& random, int64_t count) {
  std::uniform_real_distribution<double> uniform(-1.5, 1.5);
  std::vector<T> result(static_cast<size_t>(count));
  for (T& number : result) number = T(uniform(random));
  return result;
}

template <class T> std::vector<T> knots(Random& random, const kan::Problem<T>& p) {
  const bool even = random() % 2 == 0;
  std::uniform_real_distribution<double> uniform(-0.4, 0.4);
  std::vector<T> grid;
  for (int64_t i = 0; i < p.in_features; ++i)
    for (int j = 0; j < p.knots(); ++j)
      grid.push_back(T(-1 + 2 * (j - p.spline_order + (even ? 0.0 : uniform(random))) / p.grid_size));
  return grid;
}

template <class T> void run_layer(Random& random) {
  kan::Problem<T> p{};
  p.batch = one_of(random, {1, 3, 40, 300, 1000, 5000});
  p.in_features = one_of(random, {1, 2, 5, 17, 64, 130});
  p.out_features = one_of(random, {1, 3, 8, 33, 64, 200});
  if (p.batch * p.in_features * p.out_features > 20000000) p.batch = 100;
  p.grid_size = int(one_of(random, {1, 4, 5, 20}));
  p.spline_order = int(random() % 6);
  p.activation = int(random() % 6);
  p.outside = int(random() % 3);
  const int64_t rows = p.batch, inputs = p.in_features, outputs = p.out_features, weights = inputs * p.bases() * outputs;
  const auto x = numbers<T>(random, rows * inputs), scale = numbers<T>(random, rows * inputs), spline = numbers<T>(random, weights);
  const auto base = numbers<T>(random, inputs * outputs), g = numbers<T>(random, rows * outputs), grid = knots(random, p);
  auto y = numbers<T>(random, rows * outputs), dx = numbers<T>(random, rows * inputs);
  auto d_spline = numbers<T>(random, weights), d_base = numbers<T>(random, inputs * outputs);
  const T* factor = random() % 2 ? scale.data() : nullptr;
  p.x = x.data(), p.spline_weight = spline.data(), p.grid = grid.data(), p.g = g.data();
  if (p.activation != kan::kNone) p.base_weight = base.data();

  kan::Problem<T> output = p;
  output.scale = factor, output.n_output = int(random() % 4), output.y = y.data();
  kan::cpu::contract_output<T>(output, runtime);

  kan::Problem<T> backward = p;
  backward.n_weight = int(random() % 2), backward.n_input = backward.n_weight + 1;
  const auto wanted = random() % 3;  // both, the input's gradient, the weights'
  if (wanted != 2) backward.dx = dx.data();
  if (wanted != 1) backward.d_spline = d_spline.data(), backward.d_base = p.activation != kan::kNone ? d_base.data() : nullptr;
  if (wanted == 2) backward.spline_weight = backward.base_weight = nullptr, backward.scale = factor;
  kan::cpu::contract_backward<T>(backward, runtime);
}

template <class T> void run_network(Random& random) {
  const int depth = 1 + int(random() % 4);
  const int64_t rows = one_of(random, {1, 50, 700, 6000});
  const int activation = int(random() % 6), outside = int(random() % 3), order = int(random() % 4), size = int(one_of(random, {1, 5, 12}));
  std::vector<std::vector<T>> kept;
  auto keep = [&](std::vector<T> values) {
    kept.push_back(std::move(values));
    return kept.back().data();
  };
  kept.reserve(64);
  std::vector<kan::NetworkLayer<T>> layers;
  int64_t width = one_of(random, {1, 2, 5, 16});
  for (int l = 0; l < depth; ++l) {
    kan::NetworkLayer<T> layer{};
    kan::Problem<T>& p = layer.problem;
    p.batch = rows, p.in_features = width, p.out_features = width = one_of(random, {1, 3, 8, 16});
    p.grid_size = size, p.spline_order = order, p.activation = activation, p.outside = outside, p.n_input = 1;
    const int64_t edges = p.in_features * p.out_features;
    p.spline_weight = keep(numbers<T>(random, edges * p.bases()));
    p.d_spline = keep(numbers<T>(random, edges * p.bases()));
    if (activation != kan::kNone) p.base_weight = keep(numbers<T>(random, edges)), p.d_base = keep(numbers<T>(random, edges));
    p.grid = keep(knots(random, p));
    layers.push_back(layer);
  }
  kan::Problem<T>&first = layers.front().problem, &last = layers.back().problem;
  first.x = keep(numbers<T>(random, rows * first.in_features));
  last.y = keep(numbers<T>(random, rows * last.out_features));
  const kan::Network<T> network{depth, layers.data()};
  kan::cpu::network_output<T>(network, runtime);
  first.dx = keep(numbers<T>(random, rows * first.in_features));
  last.g = keep(numbers<T>(random, rows * last.out_features));
  kan::cpu::network_backward<T>(network, runtime);
}

}  // namespace

int main(int, char** arguments) {
  Random random(unsigned(std::atoi(arguments[1])));
  const int count = std::atoi(arguments[2]);
  for (int problem = 0; problem < count; ++problem) {
    if (random() % 3) run_layer<float>(random);
    else run_layer<double>(random);
    if (random() % 3) run_network<float>(random);
    else run_network<double>(random);
  }
  std::printf("%d problems ran\n", count);
}
