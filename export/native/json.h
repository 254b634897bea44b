// Just enough JSON for a manifest and a safetensors header.
#pragma once

#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace magihuman {

struct Json {
  enum class Kind { null, boolean, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> array;
  std::map<std::string, Json> object;

  const Json& at(const std::string& name) const {
    auto found = object.find(name);
    if (found == object.end()) throw std::runtime_error("the field " + name + " is missing");
    return found->second;
  }
  bool has(const std::string& name) const { return object.count(name) != 0; }
  const std::string& text() const {
    if (kind != Kind::string) throw std::runtime_error("a string is expected");
    return string;
  }
  long long whole() const {
    if (kind != Kind::number || number != static_cast<double>(static_cast<long long>(number)))
      throw std::runtime_error("a whole number is expected");
    return static_cast<long long>(number);
  }
  const std::vector<Json>& items() const {
    if (kind != Kind::array) throw std::runtime_error("a list is expected");
    return array;
  }
};

class JsonReader {
 public:
  static Json read(const std::string& text) {
    JsonReader reader(text);
    Json value = reader.value(0);
    reader.space();
    if (reader.at_ != text.size()) reader.fail("nothing may follow the value");
    return value;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}

  static constexpr int kDeepest = 64;

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("not JSON at byte " + std::to_string(at_) + ": " + why);
  }
  void space() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos)
      ++at_;
  }
  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char wanted) {
    space();
    if (next() != wanted) return false;
    ++at_;
    return true;
  }
  void need(char wanted) {
    if (!take(wanted)) fail(std::string("expected ") + wanted);
  }
  bool word(const char* wanted) {
    const std::string name(wanted);
    if (text_.compare(at_, name.size(), name) != 0) return false;
    at_ += name.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("nested too deeply");
    space();
    Json out;
    if (take('{')) {
      out.kind = Json::Kind::object;
      if (take('}')) return out;
      do {
        space();
        std::string name = quoted();
        need(':');
        out.object[name] = value(depth + 1);
      } while (take(','));
      need('}');
    } else if (take('[')) {
      out.kind = Json::Kind::array;
      if (take(']')) return out;
      do out.array.push_back(value(depth + 1));
      while (take(','));
      need(']');
    } else if (next() == '"') {
      out.kind = Json::Kind::string;
      out.string = quoted();
    } else if (word("true")) {
      out.kind = Json::Kind::boolean;
      out.boolean = true;
    } else if (word("false")) {
      out.kind = Json::Kind::boolean;
    } else if (!word("null")) {
      const char* start = text_.c_str() + at_;
      if (*start != '-' && !std::isdigit(static_cast<unsigned char>(*start))) fail("no value");
      char* end = nullptr;
      out.kind = Json::Kind::number;
      out.number = std::strtod(start, &end);
      at_ += static_cast<size_t>(end - start);
    }
    return out;
  }

  std::string quoted() {
    if (next() != '"') fail("expected a string");
    ++at_;
    std::string out;
    while (next() != '"') {
      if (at_ >= text_.size()) fail("a string does not end");
      char c = text_[at_++];
      if (c != '\\') {
        out += c;
        continue;
      }
      c = next();
      ++at_;
      switch (c) {
        case 'n':
          out += '\n';
          break;
        case 't':
          out += '\t';
          break;
        case 'r':
          out += '\r';
          break;
        case 'b':
          out += '\b';
          break;
        case 'f':
          out += '\f';
          break;
        case 'u':
          out += utf8(hex());
          break;
        case '"':
        case '\\':
        case '/':
          out += c;
          break;
        default:
          fail("an unknown escape");
      }
    }
    ++at_;
    return out;
  }

  unsigned hex() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      if (!std::isxdigit(static_cast<unsigned char>(next()))) fail("expected four hex digits");
      code = 16 * code + static_cast<unsigned>(std::stoi(std::string(1, next()), nullptr, 16));
    }
    return code;
  }

  // Pairs of surrogates stay two; no name or path of ours has one.
  static std::string utf8(unsigned code) {
    std::string out;
    if (code < 0x80) return std::string(1, static_cast<char>(code));
    if (code < 0x800) {
      out += static_cast<char>(0xC0 | code >> 6);
    } else {
      out += static_cast<char>(0xE0 | code >> 12);
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    }
    return out + static_cast<char>(0x80 | (code & 0x3F));
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace magihuman
