import Foundation

/// A JSON value, read by Foundation, which alone would take a key twice and other encodings.
enum JSON: Equatable {
    case null, bool(Bool), int(Int), number(Double), string(String)
    case array([JSON]), object([String: JSON])

    static let mostLevels = 64
    static let mostValues = 1 << 20

    var object: [String: JSON]? { if case .object(let found) = self { return found } else { return nil } }
    var array: [JSON]? { if case .array(let found) = self { return found } else { return nil } }
    var string: String? { if case .string(let found) = self { return found } else { return nil } }
    var int: Int? { if case .int(let found) = self { return found } else { return nil } }
    var double: Double? {
        switch self {
        case .int(let found): return Double(found)
        case .number(let found): return found
        default: return nil
        }
    }

    /// Parse UTF-8 text; throws PackError for what is no JSON, NaN, numbers beyond 64 bits, a key
    /// that is there twice, halves of surrogate pairs, and more values or levels than any pack has.
    static func parse(_ bytes: [UInt8]) throws -> JSON {
        let nKeys = try countKeys(bytes)
        guard Array(String(decoding: bytes, as: UTF8.self).utf8) == bytes,
            let value = try? JSONSerialization.jsonObject(with: Data(bytes), options: .fragmentsAllowed)
        else { throw PackError("not readable as JSON") }
        var left = nKeys
        let found = try JSON(value, &left)
        guard left == 0 else { throw PackError("not readable as JSON (a key twice)") }
        return found
    }

    /// Count the colons outside of strings, which follow keys, in text that is no larger than a pack's.
    private static func countKeys(_ bytes: [UInt8]) throws -> Int {
        var (nKeys, nValues, level) = (0, 0, 0)
        var (inString, escaped, afterComma) = (false, false, false)
        for byte in bytes {
            if inString {
                let ends = byte == UInt8(ascii: "\"") && !escaped
                escaped = byte == UInt8(ascii: "\\") && !escaped
                inString = !ends
                continue
            }
            // Foundation takes a comma before the end.
            guard !afterComma || ![UInt8(ascii: "]"), UInt8(ascii: "}")].contains(byte) else {
                throw PackError("not readable as JSON (no value)")
            }
            if byte > 0x20 { afterComma = byte == UInt8(ascii: ",") }
            switch byte {
            case UInt8(ascii: "\""): inString = true
            case UInt8(ascii: "{"), UInt8(ascii: "["): level += 1
            case UInt8(ascii: "}"), UInt8(ascii: "]"): level -= 1
            case UInt8(ascii: ","): nValues += 1
            case UInt8(ascii: ":"): nKeys += 1
            case 0x09, 0x0A, 0x0D, 0x20..<0x7F: break
            default: throw PackError("not readable as JSON (other text than UTF-8's ASCII)")
            }
            guard level <= mostLevels, nValues < mostValues else {
                throw PackError("not readable as JSON (too deep or large)")
            }
        }
        return nKeys
    }

    /// Foundation's value; `left` falls by the number of its keys.
    private init(_ value: Any, _ left: inout Int) throws {
        switch value {
        case is NSNull: self = .null
        case let text as String: self = .string(text)
        case let items as [Any]: self = .array(try items.map { try JSON($0, &left) })
        case let items as [String: Any]:
            left -= items.count
            self = .object(try items.mapValues { try JSON($0, &left) })
        case let number as NSNumber:
            // What it takes for more than 64 bits is a decimal number.
            guard !(number is NSDecimalNumber), number.doubleValue.isFinite else {
                throw PackError("not readable as JSON (a number beyond 64 bits)")
            }
            switch String(cString: number.objCType) {
            case "c", "B": self = .bool(number.boolValue)
            case "d", "f", "Q": self = .number(number.doubleValue)
            default: self = .int(number.intValue)
            }
        default: throw PackError("not readable as JSON")
        }
    }
}
