// The symbol table of this program or library: its functions, hence its kernels, and its __shared__
// variables, whose names contain the tag that the __shared__ macro adds.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulation {

struct SharedVariable {
  unsigned char* start;
  size_t bytes;
  std::string name;
  bool of_one = false;  // a function that was not inlined declares it, and no kernel but that one has used it

  /// Whether this function declares it. The mangled name of a local variable is _ZZ, the function's name
  /// without its _Z, E, and the variable's own name.
  bool is_of(const std::string& function) const {
    return function.starts_with("_Z") && name.compare(3, function.size() - 2, function, 2) == 0 &&
           name[function.size() + 1] == 'E';
  }
};

struct Symbols {
  std::vector<SharedVariable> shared_variables;
  std::map<const void*, std::string> functions;  // mangled names
};

/// The symbols of the module that contains `inside`. Throws if they have been stripped.
inline Symbols read_symbols(const void* inside) {
  struct Module {
    uintptr_t inside, base = 0;
    std::string path{};
  } module{.inside = reinterpret_cast<uintptr_t>(inside)};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& m = *static_cast<Module*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
          if (segment.p_type != PT_LOAD || m.inside < start || m.inside >= start + segment.p_memsz) continue;
          m.base = info->dlpi_addr;
          m.path = *info->dlpi_name == '\0' ? "/proc/self/exe" : info->dlpi_name;
          return 1;
        }
        return 0;
      },
      &module);

  std::ifstream file(module.path, std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
  const auto at = [&]<class T>(T*, uint64_t offset) {
    return reinterpret_cast<const T*>(image.data() + offset);
  };
  Symbols found;
  bool has_symbols = false;
  if (image.size() >= sizeof(ElfW(Ehdr))) {
    const auto* header = at(static_cast<ElfW(Ehdr)*>(nullptr), 0);
    const auto* sections = at(static_cast<ElfW(Shdr)*>(nullptr), header->e_shoff);
    for (int s = 0; s < header->e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      has_symbols = true;
      const auto* symbols = at(static_cast<ElfW(Sym)*>(nullptr), sections[s].sh_offset);
      const char* names = image.data() + sections[sections[s].sh_link].sh_offset;
      for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
        const auto& symbol = symbols[i];
        const char* name = names + symbol.st_name;
        void* place = reinterpret_cast<void*>(module.base + symbol.st_value);
        if ((symbol.st_info & 15) == STT_FUNC && symbol.st_value) found.functions.emplace(place, name);
        if ((symbol.st_info & 15) != STT_OBJECT || std::strncmp(name, "_ZZ", 3) != 0) continue;
        if (std::strstr(name, "B16emulation_shared") == nullptr) continue;
        // A template's variable exists once in the process, possibly in another module.
        if (symbol.st_info >> 4 == STB_GNU_UNIQUE)
          if (void* unique = dlsym(RTLD_DEFAULT, name)) place = unique;
        found.shared_variables.push_back({static_cast<unsigned char*>(place), symbol.st_size, name, false});
      }
    }
  }
  std::set<std::string_view> names;
  for (const auto& [place, name] : found.functions) names.insert(name);
  for (SharedVariable& v : found.shared_variables)
    for (size_t end = v.name.find('E', 3); end != std::string::npos; end = v.name.find('E', end + 1))
      v.of_one |= names.contains("_Z" + v.name.substr(3, end - 3));
  if (!has_symbols)
    throw std::runtime_error("emulation: " + module.path + " has no symbol table: do not strip it");
  return found;
}

}  // namespace emulation
