import XCTest
final class T: XCTestCase { func testX() { XCTAssertEqual(1,1) } }
