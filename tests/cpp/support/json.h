// A reader of the tests' JSON tables: the value comes back as the IValue that options and state dicts are made of.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace torch_ext::test {

class JsonReader {
 public:
  explicit JsonReader(std::string text) : text_(std::move(text)) {}

  c10::IValue read() {
    c10::IValue result = value();
    skip_spaces();
    TORCH_CHECK(at_ == text_.size(), "JSON: something follows the value at offset ", at_);
    return result;
  }

 private:
  void skip_spaces() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) ++at_;
  }
  bool take(const std::string& word) {
    skip_spaces();
    if (text_.compare(at_, word.size(), word) != 0) return false;
    at_ += word.size();
    return true;
  }
  void need(const std::string& word) { TORCH_CHECK(take(word), "JSON: '", word, "' expected at offset ", at_); }

  c10::IValue value() {
    if (take("{")) return object();
    if (take("[")) return array();
    if (take("\"")) return string();
    if (take("true")) return true;
    if (take("false")) return false;
    if (take("null")) return {};
    return number();
  }

  c10::IValue object() {
    c10::impl::GenericDict dict(c10::StringType::get(), c10::AnyType::get());
    if (take("}")) return dict;
    do {
      need("\"");
      std::string key = string();
      need(":");
      dict.insert(std::move(key), value());
    } while (take(","));
    need("}");
    return dict;
  }

  c10::IValue array() {
    c10::impl::GenericList list(c10::AnyType::get());
    if (take("]")) return list;
    do {
      list.push_back(value());
    } while (take(","));
    need("]");
    return list;
  }

  std::string string() {
    std::string result;
    for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      TORCH_CHECK(text_[at_] != '\\', "JSON: escapes are not read (offset ", at_, ")");
      result += text_[at_];
    }
    need("\"");
    return result;
  }

  c10::IValue number() {
    skip_spaces();
    const size_t end = std::min(text_.find_first_not_of("+-0123456789.eE", at_), text_.size());
    const std::string digits = text_.substr(at_, end - at_);
    TORCH_CHECK(!digits.empty(), "JSON: a value expected at offset ", at_);
    at_ = end;
    if (digits.find_first_of(".eE") == std::string::npos) return static_cast<int64_t>(std::stoll(digits));
    return std::strtod(digits.c_str(), nullptr);
  }

  std::string text_;
  size_t at_ = 0;
};

inline c10::IValue read_json(const std::string& path) {
  std::ifstream file(path);
  TORCH_CHECK(file, path, ": cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return JsonReader(text.str()).read();
}

}  // namespace torch_ext::test
