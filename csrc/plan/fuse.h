#pragma once

#include "plan/graph.h"

namespace maml {

/// The graph with each chain of layers that one kernel serves as one node, if nothing else reads the values
/// between them (fuse.cpp). `chain`: Kind::norm_block or Kind::conv_block, whichever the backend has.
/// `weighted`: samples have weights, so that some may be padding, which norm_block leaves out and a stem does
/// not.
Graph with_chains(const Graph& graph, Kind chain, bool weighted);

}  // namespace maml
