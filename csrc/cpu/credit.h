// credit on the CPU: B responses, M steps, K votes a step, N tokens.
#pragma once
#include "common/credit.h"

namespace capo {

// False if the input does not have the layout of a Credit.
bool credit(const CreditArgs& args);

}  // namespace capo
